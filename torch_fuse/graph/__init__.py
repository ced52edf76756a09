"""The read-only semantic view of a Dynamo graph, and one recogniser per concept."""
