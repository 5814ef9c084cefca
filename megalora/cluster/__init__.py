"""Processes and hosts: launching, watching, locks, signals and the log of each rank."""
