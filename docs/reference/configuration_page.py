"""The page of settings of the library, from the classes of ngd_dist.config."""

from model_tables import body, classes, section
from pydantic import BaseModel

from ngd_dist.config import EnergyNGDConfig, NGDConfig, SNGDConfig

__all__ = ["page"]

HEAD = """\
<!-- Written by docs/reference/configuration_page.py from ngd_dist/config: change it there. -->
# Configuration

Every setting is a field of `NGDConfig`. Where several methods can fill one field, each is a class with settings of its
own, told apart by `kind`; in Python give an instance, in a file a mapping:

```python
NGDConfig(
    lr=0.1,
    preconditioner=EKFAC(),
    damping_rule=ExponentialDamping(factor=0.5, every=100),
)
```

```yaml
lr: 0.1
preconditioner: {kind: ekfac}
damping_rule: {kind: exponential, factor: 0.5, every: 100}
```

An unknown field or a value out of bounds is an error. All classes are imported from `ngd_dist.config`.
"""
OF_TRANSFORMS = """\
## Transforms

Settings of methods that change the model, under an optimizer of your own: `SNGD(model, SNGDConfig(T=20))`, or
`transform` in a job.
"""
OF_EXACT = """\
## Small models

Settings of the natural gradient of a small model by one solve for all weights: `EnergyNGD(model, residuals,
EnergyNGDConfig(chunk=256))`.
"""


def page() -> str:
    """Returns the whole page: NGDConfig's fields, then for each field the classes that can fill it."""
    parts = [HEAD, "## NGDConfig\n", *body(NGDConfig)]
    written: set[type[BaseModel]] = set()
    for name, field in NGDConfig.model_fields.items():
        if choices := classes(field.annotation):
            parts.append(f"## {name}\n")
        for choice in choices:
            parts += section(choice, "###", written)
    parts += [OF_TRANSFORMS, *section(SNGDConfig, "###", written)]
    parts += [OF_EXACT, *section(EnergyNGDConfig, "###", written)]
    return "\n".join(parts)
