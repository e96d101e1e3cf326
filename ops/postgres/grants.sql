-- What the workers and the operators may do. Run as mollifier_owner, after every `mollifier migrate`.

GRANT USAGE ON SCHEMA mollifier TO mollifier_worker, mollifier_operator;

GRANT SELECT, INSERT, UPDATE ON mollifier.runs TO mollifier_worker;
GRANT SELECT, INSERT ON mollifier.run_aliases TO mollifier_worker;
GRANT SELECT, INSERT, UPDATE, DELETE ON mollifier.waitpoints TO mollifier_worker;
GRANT SELECT ON mollifier.settings, mollifier.organization_settings, mollifier.gate_settings, mollifier.audit TO mollifier_worker;
GRANT SELECT ON mollifier.migrations TO mollifier_worker;

GRANT SELECT, INSERT, UPDATE, DELETE ON mollifier.settings, mollifier.organization_settings, mollifier.gate_settings TO mollifier_operator;
GRANT SELECT ON mollifier.audit TO mollifier_operator;
