"""How many drafts to verify: acceptance probabilities, expected tokens, step cost and the policy.

Nothing here knows an engine. ``acceptance_model`` turns the drafter's confidence into acceptance
probabilities, ``expected_tokens`` sums them, ``step_cost`` says what a step takes, and ``policy``
chooses one verify length for a step while serving. ``simulation`` replays recorded traces under a
policy.
"""
