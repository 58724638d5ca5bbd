"""Schedules and callbacks of a run."""
