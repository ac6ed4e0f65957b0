"""The parts of raylight.sweep: one trial as Ray Tune sees it, and how a configuration becomes one."""
