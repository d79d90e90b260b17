"""Which score finds wrong answers in generated text: a comparison on generated tasks with right and wrong answers."""
