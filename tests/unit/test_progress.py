from caldpo_ray.reporting.progress import Place, describe_places


def test_places_are_told_by_role_and_node() -> None:
    places = [
        Place("policy worker", 0, "10.0.0.1", 11, ("0",)),
        Place("policy worker", 1, "10.0.0.1", 12, ("3",)),
        Place("reference actor", None, "10.0.0.2", 13, ()),
    ]
    assert describe_places(places) == "2 policy workers on 10.0.0.1 (GPU 0, 3); 1 reference actor on 10.0.0.2"
