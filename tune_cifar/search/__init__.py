"""Many trainings on Ray: propose, run, stop, resume."""
