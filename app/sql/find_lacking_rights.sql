-- The rights in the schema that the programs need and the user who asks has not.
-- Returns each as text, e.g. `INSERT on mollifier.runs`.
SELECT right_name || ' on mollifier.' || relation AS lacking
FROM (
    VALUES
        ('runs', 'SELECT'), ('runs', 'INSERT'), ('runs', 'UPDATE'),
        ('run_aliases', 'SELECT'), ('run_aliases', 'INSERT'), ('run_aliases', 'UPDATE'),
        ('waitpoints', 'SELECT'), ('waitpoints', 'INSERT'), ('waitpoints', 'UPDATE'), ('waitpoints', 'DELETE'),
        ('organization_settings', 'SELECT'), ('settings', 'SELECT'), ('gate_settings', 'SELECT'),
        ('audit', 'SELECT'), ('migrations', 'SELECT')
) AS needed (relation, right_name)
JOIN pg_namespace AS space ON space.nspname = 'mollifier'
JOIN pg_class AS class ON class.relnamespace = space.oid AND class.relname = relation
WHERE NOT has_table_privilege(class.oid, right_name)
UNION ALL
SELECT 'USAGE on schema mollifier' FROM pg_namespace
WHERE nspname = 'mollifier' AND NOT has_schema_privilege(oid, 'USAGE')
