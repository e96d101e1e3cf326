-- Which run ids are rows by now, or stand for one, and whose.
-- $1 ids, text[]
-- Returns id, organization_id, environment_id; nothing for the others
SELECT run.id, run.organization_id, run.environment_id FROM mollifier.runs AS run WHERE run.id = ANY ($1::text[])
UNION ALL
SELECT alias.id, run.organization_id, run.environment_id
FROM mollifier.run_aliases AS alias JOIN mollifier.runs AS run ON run.id = alias.run_id
WHERE alias.id = ANY ($1::text[])
