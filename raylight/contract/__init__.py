"""The terms that driver and workers share: arguments, tasks, messages, errors."""
