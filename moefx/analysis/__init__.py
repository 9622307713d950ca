"""Reports, costs, timelines and diagrams: they read programs and change none."""
