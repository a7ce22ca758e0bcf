"""The settings that an engine which shards the model can't work with. Without torch."""

from ngd_dist.config.ngd import NGDConfig

__all__ = ["refusal_of_pieces"]


def refusal_of_pieces(config: NGDConfig, averager: str) -> str | None:
    """Returns the reason, with the way out, why a rank that has pieces of directions can't act on the settings.

    averager: the name of the engine. None: it can.

    >>> from ngd_dist.config import LayerWise
    >>> refusal_of_pieces(NGDConfig(step_length=LayerWise()), "an engine").split(",")[0]
    'step_length layer_wise reads whole directions on each rank'
    """
    if config.length.kind != "given":
        way = (
            "reads whole directions on each rank" if config.length.kind == "layer_wise" else "evaluates the loss again"
        )
        return (
            f"step_length {config.length.kind} {way}, and under {averager} a rank has pieces of them and of the "
            "weights: take step_length given, with a clip if steps are too long"
        )
    if config.needs_objective:
        return (
            f"damping_rule {config.damping_rule.kind} evaluates the loss again at other weights, and under {averager} "
            "a rank has pieces of them: take damping_rule constant, exponential or polynomial"
        )
    if config.statistics_fraction < 1 and config.fisher.kind != "empirical":
        return (
            f"statistics_fraction with fisher {config.fisher.kind} runs the model a second time in each pass, which "
            f"{averager} would count as one of training: take fisher empirical, or statistics_fraction 1"
        )
    if config.loss_reduction == "sum":
        return f"loss_reduction 'sum' needs the bare model: {averager} divides the sum by the number of ranks"
    return None
