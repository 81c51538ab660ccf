"""The data wing: from NIfTI files to batches of packed brain voxels."""
