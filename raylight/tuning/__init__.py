"""What raylight.sweep is made of: one trial as Ray Tune sees it, and how a configuration becomes one."""
