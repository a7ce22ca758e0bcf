"""The driver with an eye on its Ray cluster all the time: ``python -m tests.support.quick_driver ATTEMPT_DIR``."""

from ngd_workers.launch import driver, groups

groups.LOOK_S = 1.0
groups.STEADY_S = 5.0

if __name__ == "__main__":
    driver.main()
