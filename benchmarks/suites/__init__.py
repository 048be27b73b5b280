"""Published test set-ups of paged attention kernels, described again: setup, calls, rules, published, marks."""
