"""The store on disk: its format, its reader, and what is in it."""
