"""From a watched forward pass to the plan of what is quantized how."""

from gplq.planning.example import Example
from gplq.planning.plan import make_plan

__all__ = ['Example', 'make_plan']
