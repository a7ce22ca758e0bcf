"""Workers on Ray Train: they turn a JobSpec into a trained model and a stream of events.

Start at `launch/driver.py` (one attempt on Ray) or `train/loop.py` (the training itself). `contract/` is shared with
the service and loads no torch.
"""
