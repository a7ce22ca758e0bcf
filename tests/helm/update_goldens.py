"""Rewrites tests/helm/golden from the chart: python -m tests.helm.update_goldens. Read the diff."""

from tests.support.chart import GOLDEN, VALUES, golden_text, render, values_of


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for old in GOLDEN.glob("*.yaml"):
        old.unlink()
    for scenario in VALUES:
        (GOLDEN / f"{scenario}.yaml").write_text(golden_text(render(values_of(scenario))))


if __name__ == "__main__":
    main()
