"""Where a run's numbers go, and what in them a person is woken for."""
