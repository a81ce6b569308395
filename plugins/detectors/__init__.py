"""Detector plugins: one folder is one plugin, written as a stranger would write one."""
