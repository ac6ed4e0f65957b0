"""Lightning's names: where each is found here, and why some are not."""
