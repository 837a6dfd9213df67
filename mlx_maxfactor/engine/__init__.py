"""One step of all parameters, and what surrounds it: trees, schedules, guard, averages."""
