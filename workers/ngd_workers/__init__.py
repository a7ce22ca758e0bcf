"""Ray Train workers: turn a JobSpec into a trained model and a stream of events.

Start at `driver` (one attempt on Ray) or `loop` (the training itself). `spec`, `events` and `rundir` are the contract
with the service and load no torch.
"""
