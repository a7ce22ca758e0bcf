"""The controller and its dashboard: jobs over REST, dispatched to workers, watched in a browser.

Start at `app`. Importing this package loads neither torch nor ray.
"""
