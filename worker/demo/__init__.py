"""What does Shiftworker do? Shown on any machine, with real jobs."""
