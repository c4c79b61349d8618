"""How many drafts to verify: an acceptance model, a cost model and the choice between requests.

Nothing here knows an engine. ``acceptance`` turns the drafter's confidence into probabilities,
``cost`` says what a pass takes, ``allocate`` chooses, ``width`` chooses one number for a whole step
while serving, and ``simulate`` replays recorded ``traces`` under a policy.
"""
