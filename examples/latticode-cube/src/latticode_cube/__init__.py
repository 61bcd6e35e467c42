"""What this package adds to latticode. Importing it registers everything; the entry point names it."""

from importlib.resources import files

import latticode
from latticode_cube.additions import checkers, cube, cube_of_size, huber, worst_error
from latticode_cube.quantizer import Cube

latticode.register("cube", Cube)  # a name for specs and recipes: {type: cube, side: 4, dim: 3}
latticode.register("cube", cube_of_size, kind="study")  # latticode study --quantizers cube
latticode.register("cube", cube, kind="verb")  # latticode cube 1000
latticode.register("cube-digits", files("latticode_cube") / "cube-digits.yaml", kind="recipe")
latticode.register("huber", huber, kind="loss")  # objective.terms=[huber]
latticode.register("worst_error", worst_error, kind="metric")  # in every tokenizer's evaluation
latticode.register("checkers", checkers, kind="source")  # data.source=checkers:100
