"""Fixtures that several folders share."""

pytest_plugins = ["controlplane.fixtures", "controlplane.reports"]
