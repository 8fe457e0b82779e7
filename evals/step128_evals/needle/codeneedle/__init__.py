"""The public benchmark alexziskind1/codeneedle: its rules in our own code, its texts read from the user's own clone."""
