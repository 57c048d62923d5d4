"""Students of one teacher for every (task, loss, seed), resumable, and their comparison."""
