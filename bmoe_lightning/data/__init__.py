"""Multiple-choice data: tasks, prompts and the DataModule."""
