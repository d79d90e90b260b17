"""The main job, `python -m recipes.qwen_obqa`."""
