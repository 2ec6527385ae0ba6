"""Templates about plane and solid geometry."""
# ruff: noqa: E501 - sentences stay on one line

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import comb, gcd, isqrt

from .draw import Draw, Problem, a, frac, listed, num

TRIPLES = ((3, 4, 5), (5, 12, 13), (8, 15, 17), (7, 24, 25), (20, 21, 29), (9, 40, 41), (12, 35, 37))


def ladder_on_wall(d: Draw) -> Problem:
    x, y, z = d.pick(*TRIPLES[:5])
    k = d.whole(1, 3)
    x, y, z = x * k, y * k, z * k
    foot, height = d.pick((x, y), (y, x))
    what, wall = d.pick(("ladder", "a wall"), ("plank", "a shed"), ("board", "a barn"), ("ramp", "a platform"))
    problem = d.pick(
        f"Leaning a {what} {z} units long against {wall}, a worker puts its lower end {foot} units away on level ground. How high does it reach?",
        f"With its lower end standing {foot} from the foot of {wall}, a {what} of length {z} leans on it. Find the height of the upper end.",
    )
    rationale = d.pick(
        f"Together the {what}, the ground and {wall} form a right triangle whose longest side is {z}. By Pythagoras the height h satisfies h^2 = {z}^2 - {foot}^2, and {z}^2 - {foot}^2 = {z * z} - {foot * foot} = {height * height}. The square root is {height}, so it reaches {height} units up.",
        f"With height h, {foot}^2 + h^2 = {z}^2. Thus h^2 = {z * z} - {foot * foot} = {height * height}, and since {height}^2 = {height * height}, the height is {height} units.",
    )
    return Problem(problem, rationale, height, {"foot": foot, "z": z})


def rectangle_from_diagonal(d: Draw) -> Problem:
    x, y, z = d.pick(*TRIPLES)
    k = d.whole(1, 4)
    x, y, z = x * k, y * k, z * k
    what = d.pick("sports field", "picture frame", "floor", "sheet of glass", "garden")
    problem = d.pick(
        f"Some rectangular {what} is {y} long and has a diagonal of {z}. Find its perimeter and its area.",
        f"Measured across, the diagonal of a rectangular {what} is {z} and its longer side is {y}. What are the area and the perimeter?",
    )
    rationale = d.pick(
        f"Its diagonal splits the rectangle into two right triangles. The shorter side squared is {z}^2 - {y}^2 = {z * z} - {y * y} = {x * x}, so it is {x}. Perimeter: 2 * ({y} + {x}) = {2 * (x + y)}. Area: {y} * {x} = {x * y}.",
        f"First find the missing side s: s^2 = {z * z} - {y * y} = {x * x} gives s = {x}. All around that makes 2 * {y} + 2 * {x} = {2 * (x + y)}, and the surface is {y} * {x} = {x * y} square units.",
    )
    return Problem(problem, rationale, f"perimeter {2 * (x + y)}, area {x * y}", {"y": y, "z": z, "x": x})


def path_around(d: Draw) -> Problem:
    what = d.pick("pond", "lawn", "swimming pool", "rose bed", "playground")
    length, width, w = d.whole(8, 40), d.whole(5, 25), d.whole(1, 4)
    outer, inner = (length + 2 * w) * (width + 2 * w), length * width
    area = outer - inner
    price = d.whole(12, 60)
    problem = d.pick(
        f"Picture a rectangular {what}, {length} m by {width} m, surrounded by a path {w} m wide. Paving costs ${price} per square metre. What does the path cost?",
        f"Around a {length} m by {width} m {what} runs a border of constant width {w} m. At ${price} a square metre, how much must be paid to pave the border?",
    )
    rationale = d.pick(
        f"Outside the path the rectangle measures {length} + 2 * {w} = {length + 2 * w} m by {width} + 2 * {w} = {width + 2 * w} m. The path is the difference of the areas: {length + 2 * w} * {width + 2 * w} - {length} * {width} = {outer} - {inner} = {area} square metres. The cost is {area} * {price} = {area * price:,} dollars.",
        f"Cut the border into two strips along the long sides, {w} * {length} each, two along the short sides, {w} * {width} each, and four corner squares of {w} * {w}. In all 2 * {w * length} + 2 * {w * width} + 4 * {w * w} = {area} square metres, costing {area} * {price} = {area * price:,} dollars.",
    )
    return Problem(problem, rationale, area * price, {"length": length, "width": width, "w": w, "price": price})


def interior_angles(d: Draw) -> Problem:
    n = d.pick(5, 6, 8, 9, 10, 12, 15, 18, 20, 24, 30, 36)
    inner = Fraction(180 * (n - 2), n)
    outer = Fraction(360, n)
    problem = d.pick(
        f"Each interior angle of a regular polygon measures {num(inner)} degrees. How many sides does the polygon have, and what do its angles add up to?",
        f"A regular polygon has interior angles of {num(inner)} degrees. Find the number of its sides and of its diagonals.",
    )
    diagonals = n * (n - 3) // 2
    asks_diagonals = "diagonals" in problem
    tail = (
        f"From every corner one can draw {n} - 3 = {n - 3} diagonals, and each is met twice, so there are {n} * {n - 3} / 2 = {diagonals} of them."
        if asks_diagonals
        else f"The angles sum to {n} * {num(inner)} = {180 * (n - 2):,} degrees, which is also 180 * ({n} - 2) = {180 * (n - 2):,}."
    )
    rationale = d.pick(
        f"An exterior angle is 180 - {num(inner)} = {num(outer)} degrees, and all exterior angles together make one full turn, so the number of sides is 360 / {num(outer)} = {n}. {tail}",
        f"For n sides an interior angle is 180 - 360/n degrees. From 180 - 360/n = {num(inner)} we get 360/n = {num(outer)} and n = {n}. {tail}",
    )
    return Problem(problem, rationale, n, {"inner": inner, "asks_diagonals": int(asks_diagonals)})


def triangle_angles(d: Draw) -> Problem:
    p, q, r = d.until(
        lambda: (d.whole(1, 9), d.whole(1, 9), d.whole(1, 9)),
        lambda v: 180 % sum(v) == 0 and len(set(v)) > 1 and gcd(*v) == 1,
    )
    part = 180 // (p + q + r)
    angles = [p * part, q * part, r * part]
    kind = "right-angled" if max(angles) == 90 else "obtuse" if max(angles) > 90 else "acute"
    problem = d.pick(
        f"Three angles of a triangle are in the ratio {p}:{q}:{r}. Find them and say whether the triangle is acute, right-angled or obtuse.",
        f"In a triangle the three angles relate as {p} to {q} to {r}. How large are they, and what kind of triangle is it?",
    )
    rationale = d.pick(
        f"The {p} + {q} + {r} = {p + q + r} parts share 180 degrees, so one part is 180 / {p + q + r} = {part} degrees. The angles are {p} * {part} = {angles[0]}, {q} * {part} = {angles[1]} and {r} * {part} = {angles[2]} degrees. As the largest is {max(angles)}, the triangle is {kind}.",
        f"Let the angles be {p}t, {q}t and {r}t. Their sum, {p + q + r}t, must be 180, hence t = 180 / {p + q + r} = {part}. That gives {listed(angles)} degrees. The largest angle, {max(angles)}, decides: the triangle is {kind}.",
    ).replace(" 1t", " t")
    return Problem(problem, rationale, f"{listed(angles)}, {kind}", {"p": p, "q": q, "r": r, "angles": angles})


def shadow_heights(d: Draw) -> Problem:
    tall = d.pick("a church tower", "a poplar", "a chimney", "a lighthouse", "a flagpole", "a crane")
    stick, sshadow, shadow = d.until(
        lambda: (d.whole(1, 6), d.whole(1, 9), d.whole(12, 96)), lambda v: (v[2] * v[0]) % v[1] == 0 and v[0] != v[1]
    )
    height = shadow * stick // sshadow
    who = d.name()
    problem = d.pick(
        f"{who} holds a pole of {stick} m upright; its shadow is {sshadow} m long. At the same moment {tall} throws a shadow of {shadow} m. How high is it?",
        f"At a certain hour an upright rod {stick} m tall casts a shadow of {sshadow} m, and {tall} one of {shadow} m. Find the height {who} should write down.",
    )
    rationale = d.pick(
        f"Since the sun's rays are parallel, the two right triangles are similar and height to shadow is the same for both, {stick} to {sshadow}. Therefore the height is {shadow} * {stick} / {sshadow} = {height} m.",
        f"By comparison, the longer shadow is {shadow} / {sshadow} = {frac(Fraction(shadow, sshadow))} times the shorter one. Because of similarity the heights are in the same proportion: {stick} * {frac(Fraction(shadow, sshadow))} = {height} m.",
    )
    return Problem(problem, rationale, height, {"stick": stick, "sshadow": sshadow, "shadow": shadow})


def box_volume(d: Draw) -> Problem:
    what = d.pick("an aquarium", "a water trough", "a stone basin", "a concrete basin")
    x, y, z = d.whole(40, 120, 10), d.whole(30, 80, 10), d.whole(30, 70, 10)
    litres = Fraction(x * y * z, 1000)
    stone = d.whole(2, 9)
    rise = Fraction(stone * 1000, x * y)
    if rise.denominator not in (1, 2, 4, 5, 8, 10, 20):
        return box_volume(d)
    level = d.whole(10, z - 10, 5)
    new = level + rise
    water = Fraction(x * y * level, 1000)
    problem = d.pick(
        f"{what.capitalize()} has a base of {x} cm by {y} cm and is {z} cm high. Water stands {level} cm deep. How many litres is that, and how high does the water stand after a stone of {stone} litres is lowered in?",
        f"Water fills {what} ({x} cm long, {y} cm wide, {z} cm high) to a depth of {level} cm. Find the volume of the water in litres, and the new depth once an object of {stone} litres lies under water.",
    )
    rationale = d.pick(
        f"The volume is {x} * {y} * {level} = {x * y * level:,} cubic centimetres, and with 1,000 of them to the litre that is {num(water)} litres. The stone pushes up {stone} * 1000 = {stone * 1000:,} cubic centimetres over a base of {x} * {y} = {x * y:,} square centimetres: the level rises by {stone * 1000:,} / {x * y:,} = {num(rise)} cm, to {level} + {num(rise)} = {num(new)} cm.",
        f"Over the base of {x} * {y} = {x * y:,} square centimetres, each centimetre of depth holds {num(Fraction(x * y, 1000))} litres. So the water is {level} * {num(Fraction(x * y, 1000))} = {num(water)} litres, and {stone} litres more raise the surface by {stone} / {num(Fraction(x * y, 1000))} = {num(rise)} cm. The new depth is {num(new)} cm.",
    )
    return Problem(problem, rationale, new, {"x": x, "y": y, "z": z, "level": level, "stone": stone, "litres": litres})


def painted_cube(d: Draw) -> Problem:
    n = d.whole(4, 12)
    colour = d.pick("red", "blue", "green", "black", "gold")
    three, two, one, none = 8, 12 * (n - 2), 6 * (n - 2) ** 2, (n - 2) ** 3
    ask = d.pick((0, none), (1, one), (2, two))
    word = {0: "no painted face", 1: "exactly one painted face", 2: "exactly two painted faces"}[ask[0]]
    problem = d.pick(
        f"A wooden cube with an edge of {n} cm is painted {colour} on all sides and sawn into cubes of 1 cm. How many of these have {word}?",
        f"After being painted {colour} all over, {a(n)} by {n} by {n} block is cut into unit cubes. Count the unit cubes with {word}.",
    )
    why = {
        0: f"Unpainted cubes form the inner block that is left when one layer is taken off on every side. Its edge is {n} - 2 = {n - 2}, so it contains {n - 2}^3 = {none} cubes.",
        1: f"Cubes with one painted face lie inside a face, away from its edges. Each face shows ({n} - 2)^2 = {(n - 2) ** 2} of them, and there are six faces: 6 * {(n - 2) ** 2} = {one}.",
        2: f"Two painted faces occur along an edge but not at its ends. Each of the 12 edges has {n} - 2 = {n - 2} such cubes, so 12 * {n - 2} = {two}.",
    }[ask[0]]
    rationale = d.pick(
        f"{why} As a check, all kinds together are {three} + {two} + {one} + {none} = {n**3}, which is {n}^3 = {n**3}.",
        f"There are {n}^3 = {n**3} small cubes in all. {why}",
    )
    return Problem(problem, rationale, ask[1], {"n": n, "faces": ask[0]})


def tiles_without_cutting(d: Draw) -> Problem:
    room = d.pick("kitchen", "hallway", "bathroom", "terrace", "storeroom")
    g = d.pick(12, 15, 20, 24, 25, 30, 40)
    p, q = d.until(lambda: (d.whole(7, 24), d.whole(5, 19)), lambda v: gcd(v[0], v[1]) == 1)
    x, y = g * p, g * q
    problem = d.pick(
        f"Suppose a {room} measures {x} cm by {y} cm. It is to be covered with square tiles, all alike and as large as possible, without cutting any. How large is a tile and how many are needed?",
        f"Find the side of the largest square tile that covers a {x} cm by {y} cm {room} exactly, with no tile cut, and the number of tiles.",
    )
    steps, u, v = [], x, y
    while v:
        steps.append(f"{u} = {u // v} * {v} + {u % v}")
        u, v = v, u % v
    rationale = d.pick(
        f"The side must divide both lengths, so we want the greatest common divisor of {x} and {y}. Euclid's algorithm: {'; '.join(steps)}. The last divisor is {g}, so tiles of {g} cm are used, {x} / {g} = {p} along one side and {y} / {g} = {q} along the other, {p} * {q} = {p * q} in all.",
        f"Repeated division gives {', then '.join(steps)}, so the greatest common divisor is {g}. With sides of {g} cm there are {p} rows of {q} tiles: {p} * {q} = {p * q}. No larger square fits, because {p} and {q} have no common factor.",
    )
    return Problem(problem, rationale, f"{g} cm, {p * q} tiles", {"x": x, "y": y, "g": g, "count": p * q})


def lattice_triangle(d: Draw) -> Problem:
    pts = d.until(
        lambda: [(d.whole(0, 9), d.whole(0, 9)) for _ in range(3)],
        lambda v: abs((v[1][0] - v[0][0]) * (v[2][1] - v[0][1]) - (v[2][0] - v[0][0]) * (v[1][1] - v[0][1])) > 7,
    )
    (ax, ay), (bx, by), (cx, cy) = pts
    u, v, w, z = bx - ax, by - ay, cx - ax, cy - ay
    det = u * z - w * v
    area = Fraction(abs(det), 2)
    names = d.pick("A, B, C", "P, Q, R", "K, L, M").split(", ")
    corners = ", ".join(f"{n}({px}, {py})" for n, (px, py) in zip(names, pts, strict=True))
    problem = d.pick(
        f"Compute the area of the triangle with corners {corners}.",
        f"In a coordinate grid the points {corners} are joined to form a triangle. How large is its area?",
        f"A surveyor notes three boundary stones at {corners}, in a square grid. What area do they enclose?",
    )
    rationale = d.pick(
        f"From {names[0]} the other corners are reached by the vectors ({u}, {v}) and ({w}, {z}). Half the absolute value of their determinant is the area. The determinant is ({u}) * ({z}) - ({w}) * ({v}) = {u * z - w * v}, so the area is {abs(det)} / 2 = {num(area)} square units.",
        f"By the shoelace formula twice the signed area is {ax} * ({by} - {cy}) + {bx} * ({cy} - {ay}) + {cx} * ({ay} - {by}) = {ax * (by - cy)} + ({bx * (cy - ay)}) + ({cx * (ay - by)}) = {ax * (by - cy) + bx * (cy - ay) + cx * (ay - by)}. Dropping the sign and halving, the area is {num(area)} square units.",
    )
    return Problem(problem, rationale, area, {"ax": ax, "ay": ay, "bx": bx, "by": by, "cx": cx, "cy": cy})


def rectangles_in_grid(d: Draw) -> Problem:
    r, c = d.whole(2, 7), d.whole(3, 9)
    what = d.pick(
        "window is divided into panes",
        "chocolate bar is scored into pieces",
        "sheet of stamps is perforated into stamps",
        "wall is covered with tiles",
    )
    count = comb(r + 1, 2) * comb(c + 1, 2)
    problem = d.pick(
        f"Each {what}, {r} rows of {c}. How many rectangles of any size, with sides along the lines, can be seen in one?",
        f"When a {what} arranged in {r} rows and {c} columns, how many rectangles are there, counting every size, also single ones and the whole?",
    )
    rationale = d.pick(
        f"A rectangle is fixed by two of the {r + 1} horizontal lines and two of the {c + 1} vertical ones. There are {r + 1} * {r} / 2 = {comb(r + 1, 2)} choices for the first pair and {c + 1} * {c} / 2 = {comb(c + 1, 2)} for the second, hence {comb(r + 1, 2)} * {comb(c + 1, 2)} = {count} rectangles.",
        f"Along the rows a stretch can have length 1 to {c}, which gives {' + '.join(str(i) for i in range(c, 0, -1))} = {comb(c + 1, 2)} stretches. In the other direction there are {' + '.join(str(i) for i in range(r, 0, -1))} = {comb(r + 1, 2)}. Combining them: {comb(c + 1, 2)} * {comb(r + 1, 2)} = {count}.",
    )
    return Problem(problem, rationale, count, {"r": r, "c": c})


def fence_best_area(d: Draw) -> Problem:
    who, beast = d.name(), d.pick("sheep", "geese", "ponies", "hens", "alpacas")
    fence = d.whole(20, 120, 4)
    side = fence // 4
    three = d.pick(True, False)
    across, along = (Fraction(fence, 4), Fraction(fence, 2)) if three else (Fraction(side), Fraction(side))
    area = across * along
    problem = (
        f"{who} has {fence} m of fence for a rectangular pen for {beast}. One side is formed by a long wall and needs no fence. What is the largest area possible?"
        if three
        else f"With {fence} m of fence {who} encloses a rectangular pen for {beast}. Which side lengths give the largest area, and what is that area?"
    )
    other = across - 1
    rationale = (
        f"Let the two sides at right angles to the wall be x metres long. The third is {fence} - 2x, and the area is x({fence} - 2x), a parabola that is zero at x = 0 and at x = {num(Fraction(fence, 2))} and highest halfway, at x = {num(across)}. Then the side along the wall is {fence} - 2 * {num(across)} = {num(along)} m and the area {num(across)} * {num(along)} = {num(area)} square metres."
        if three
        else f"If one side is x, the other is {fence // 2} - x, since two neighbouring sides use half of the fence. The product x({fence // 2} - x) is largest when both factors are equal, x = {fence // 2} / 2 = {side}. A square of side {side} m gives {side}^2 = {side * side} square metres; for comparison, {num(other)} m by {num(fence // 2 - other)} m gives only {num(other)} * {num(fence // 2 - other)} = {num(other * (fence // 2 - other))}."
    )
    return Problem(problem, rationale, area, {"fence": fence, "three": int(three)})


def square_cut_corners(d: Draw) -> Problem:
    side, cut = d.until(lambda: (d.whole(10, 40), d.whole(2, 9)), lambda v: v[0] > 2 * v[1] + 3)
    base = side - 2 * cut
    vol, surf = base * base * cut, side * side - 4 * cut * cut
    root = isqrt(base * base)
    problem = d.pick(
        f"From each corner of a square sheet of tin, {side} cm on a side, a square of {cut} cm is cut away. The flaps are folded up into an open box. Find its volume and how much tin it is made of.",
        f"An open tray is folded from a {side} cm square of card after cutting {cut} cm squares out of the four corners. What is the tray's capacity in cubic centimetres, and what is the area of card left?",
    )
    rationale = d.pick(
        f"For the base of the box one has {side} - 2 * {cut} = {root} cm on each side and its height is {cut} cm. The volume is {base} * {base} * {cut} = {vol:,} cubic centimetres. The tin that remains measures {side}^2 - 4 * {cut}^2 = {side * side} - {4 * cut * cut} = {surf:,} square centimetres.",
        f"Folding up the flaps gives a height of {cut} cm and leaves {side} - {cut} - {cut} = {base} cm for the base. So it holds {base}^2 * {cut} = {base * base} * {cut} = {vol:,} cubic centimetres. Its surface is the base and four walls: {base * base} + 4 * {base * cut} = {surf:,} square centimetres.",
    )
    return Problem(problem, rationale, vol, {"side": side, "cut": cut})


TEMPLATES: tuple[Callable[[Draw], Problem], ...] = (
    ladder_on_wall,
    rectangle_from_diagonal,
    path_around,
    interior_angles,
    triangle_angles,
    shadow_heights,
    box_volume,
    painted_cube,
    tiles_without_cutting,
    lattice_triangle,
    rectangles_in_grid,
    fence_best_area,
    square_cut_corners,
)
