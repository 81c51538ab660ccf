"""The model wing: Swin4D, SimMIM and their geometry; it knows no files."""
