"""The dashboard: NiceGUI pages on the service's own application. Start at jobs.py and job.py.

It reads through `service.client` and nothing else, as any user could.
"""

from service.dashboard.mounting import mount

__all__ = ["mount"]
