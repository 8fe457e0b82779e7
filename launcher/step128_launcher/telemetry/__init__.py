"""What GPUs and host do while the server runs: sysfs and procfs, read at each scrape, nothing installed for it."""
