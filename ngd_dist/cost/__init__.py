"""The cost of training before it runs: memory, bytes between ranks, seconds. Start at `plan.plan`. Imports no torch.

It counts from a card of the model (`card.ModelCard`), the optimizer's settings and a description of the machines
(`cluster.Cluster`). `ngd_dist.model_card` makes the card of a model.
"""
