"""A problem and its solution, for tests that need one."""

PROMPT = "Mia has 12 apples. She buys 3 times as many. How many apples does Mia have now?"
STEPS = ["Step 1: 12 * 3 = 36", "Step 2: 12 + 36 = 48", "Answer: 48"]
