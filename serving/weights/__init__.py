"""Fetches weights onto a volume and checks them on a CPU: `calotype fetch`."""
