from cadiff_cli.api import load_model as load_model
from cadiff_cli.api import load_scan as load_scan
from cadiff_cli.api import segment as segment
from cadiff_cli.config import Config as Config
from cadiff_cli.io.templates import load_templates as load_templates

__version__: str
