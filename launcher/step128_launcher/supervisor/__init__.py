"""One server's life: start, load, verify, watch, restart, step down, end; and what it tells of it."""
