"""Puts a person into a scene, back to front."""

from __future__ import annotations

import numpy as np

from preprocess.demo.backdrops import draw_backdrop
from preprocess.demo.cast import Composition, Person
from preprocess.demo.clothes import body_mask, paint_body, paint_earrings, paint_glasses, paint_hat
from preprocess.demo.hair import hair_behind, hair_over, paint_hair, skull_cap
from preprocess.demo.head import Head, head_outline, paint_ears, paint_face
from preprocess.demo.scene import Scene


def compose(composition: Composition) -> Scene:
    """Draws a composition without light; `Scene.shade` lights it."""
    width, height = composition.character.size
    scene = Scene(height, width)
    draw_backdrop(scene, composition.character.place)
    _draw_person(scene, composition.character.person, composition.looking)
    scene.expose()
    return scene


def _draw_person(scene: Scene, person: Person, looking: str) -> None:
    head = Head(scene, person, looking)
    body = body_mask(scene, head, person)
    outline = scene.polygon(head_outline(head))
    behind, over = hair_behind(scene, head, person), hair_over(scene, head, person)

    silhouette = np.maximum.reduce([body, outline, behind, skull_cap(scene, head, 1.08)])
    scene.cast(silhouette, 0.085 * head.unit)
    paint_hair(scene, head, person, behind, shade=0.72)
    paint_body(scene, head, person, body)
    scene.cast(outline, 0.05 * head.unit)
    paint_face(scene, head, person, outline)
    scene.cast(over, 0.015 * head.unit)
    paint_hair(scene, head, person, over)
    if person.hair in ("short", "bun"):  # the other styles cover the ears
        paint_ears(scene, head, person)
    if person.glasses:
        paint_glasses(scene, head)
    if person.earrings:
        paint_earrings(scene, head)
    if person.hat:
        paint_hat(scene, head, person)
