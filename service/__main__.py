"""python -m service: the same as `ngd serve`."""

from service.server import serve
from service.settings import load_settings

if __name__ == "__main__":
    serve(load_settings())
