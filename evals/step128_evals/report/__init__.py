"""Result files as one Markdown document with pictures."""
