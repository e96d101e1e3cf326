-- Which run ids are rows by now, or stand for one, and of which environment.
-- $1 ids, text[]
-- Returns id, environment_id; nothing for the others
SELECT run.id, run.environment_id FROM mollifier.runs AS run WHERE run.id = ANY ($1::text[])
UNION ALL
SELECT alias.id, alias.environment_id FROM mollifier.run_aliases AS alias WHERE alias.id = ANY ($1::text[])
