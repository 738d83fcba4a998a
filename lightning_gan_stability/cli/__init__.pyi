from .main import main as main
from .training import build as build
