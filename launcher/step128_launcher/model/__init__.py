"""A checkpoint on disk, read without torch: names, shapes, formats, and what each rank holds of it."""
