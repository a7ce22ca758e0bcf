{{/* Values that are each right and together wrong. Each ends the render with a sentence that says what to do. */}}
{{- define "ngd.check" -}}
{{- include "ngd.checkDatabase" . -}}
{{- include "ngd.checkDispatcher" . -}}
{{- include "ngd.checkRoute" . -}}
{{- include "ngd.checkCluster" . -}}
{{- end -}}

{{- define "ngd.checkDatabase" -}}
{{- $v := .Values -}}
{{- if eq $v.database.type "sqlite" -}}
{{- if include "ngd.severalControllers" . -}}
{{- fail (printf "SQLite is one file that one controller may open, but controller.replicas is %d (controller.autoscaling.enabled is %t): set database.type=postgres, or one replica" (int $v.controller.replicas) $v.controller.autoscaling.enabled) -}}
{{- end -}}
{{- if $v.dashboard.separate -}}
{{- fail "dashboard.separate runs a second controller, and SQLite is one file that one controller may open: set database.type=postgres, or dashboard.separate=false" -}}
{{- end -}}
{{- if or $v.database.existingSecret $v.database.host $v.database.passwordSecret -}}
{{- fail "database.existingSecret, host and passwordSecret are for PostgreSQL, and database.type is sqlite: set database.type=postgres, or leave them empty" -}}
{{- end -}}
{{- else if not $v.database.existingSecret -}}
{{- if not (and $v.database.host $v.database.passwordSecret) -}}
{{- fail "database.type=postgres needs database.existingSecret (a secret with the whole URL), or database.host and database.passwordSecret (a secret with the password)" -}}
{{- end -}}
{{- if and (hasPrefix "verify-" $v.database.sslMode) (not $v.database.caSecret) -}}
{{- fail (printf "database.sslMode=%s compares PostgreSQL's certificate with an authority: name its secret in database.caSecret, or set sslMode=require" $v.database.sslMode) -}}
{{- end -}}
{{- else if or $v.database.host $v.database.passwordSecret -}}
{{- fail "database.existingSecret holds the whole URL: leave database.host and database.passwordSecret empty, or the secret" -}}
{{- end -}}
{{- end -}}

{{- define "ngd.checkDispatcher" -}}
{{- $v := .Values -}}
{{- $mode := $v.dispatcher.mode -}}
{{- if and (eq $mode "local") (or (include "ngd.severalControllers" .) $v.dashboard.separate) -}}
{{- fail "with dispatcher.mode=local jobs are processes in the controller's own pod, which no other controller sees: use one replica without autoscaling and dashboard.separate, or ray_jobs or kuberay" -}}
{{- end -}}
{{- if and (eq $mode "ray_jobs") (not $v.rayCluster.enabled) (not $v.ray.address) -}}
{{- fail "dispatcher.mode=ray_jobs needs a Ray cluster: set rayCluster.enabled=true (KubeRay runs one), or ray.address to an existing one's dashboard, http://head:8265" -}}
{{- end -}}
{{- if and $v.rayCluster.enabled $v.ray.address -}}
{{- fail "rayCluster.enabled makes a Ray cluster and ray.address names another: give one of them" -}}
{{- end -}}
{{- if and $v.rayCluster.enabled (ne $mode "ray_jobs") -}}
{{- fail (printf "rayCluster.enabled makes one cluster for dispatcher.mode=ray_jobs, got %s: kuberay makes a cluster for each attempt from rayCluster.head and workerGroups, with rayCluster.enabled=false" $mode) -}}
{{- end -}}
{{- if and $v.ray.address (ne $mode "ray_jobs") -}}
{{- fail (printf "ray.address is for dispatcher.mode=ray_jobs, got %s" $mode) -}}
{{- end -}}
{{- if and $v.ray.existingSecret (not $v.ray.address) -}}
{{- fail "ray.existingSecret is the token of the cluster at ray.address, which is empty; the chart's own cluster takes rayCluster.authSecret" -}}
{{- end -}}
{{- if and $v.rayCluster.autoscaling.enabled (not $v.rayCluster.enabled) -}}
{{- fail "rayCluster.autoscaling is for the one cluster of rayCluster.enabled=true: with kuberay each attempt's cluster has the size of its job" -}}
{{- end -}}
{{- if and (ne $mode "local") (not $v.storage.runs.existingClaim) (not (has "ReadWriteMany" $v.storage.runs.accessModes)) -}}
{{- fail (printf "with dispatcher.mode=%s controllers and Ray's pods share the runs: storage.runs.accessModes must include ReadWriteMany, got %s" $mode (join ", " $v.storage.runs.accessModes)) -}}
{{- end -}}
{{- $names := list -}}
{{- range $v.rayCluster.workerGroups -}}
{{- $group := mergeOverwrite (deepCopy $v.rayCluster.workerDefaults) . -}}
{{- if has .name $names -}}
{{- fail (printf "two groups of rayCluster.workerGroups are called %s: names must differ" .name) -}}
{{- end -}}
{{- if or (lt (int $group.replicas) (int $group.minReplicas)) (gt (int $group.replicas) (int $group.maxReplicas)) -}}
{{- fail (printf "rayCluster.workerGroups: replicas of %s must be between minReplicas (%d) and maxReplicas (%d), got %d" .name (int $group.minReplicas) (int $group.maxReplicas) (int $group.replicas)) -}}
{{- end -}}
{{- if and $group.resourceClaims (semverCompare "<1.31.0-0" $.Capabilities.KubeVersion.Version) -}}
{{- fail (printf "rayCluster.workerGroups: resourceClaims of %s need Kubernetes 1.31 or newer, got %s: use gpusPerPod" .name $.Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- if and (eq $group.pack.mode "required") (semverCompare "<1.31.0-0" $.Capabilities.KubeVersion.Version) -}}
{{- fail (printf "rayCluster.workerGroups: pack.mode=required of %s needs Kubernetes 1.31 or newer, which tells one Ray cluster's pods from another's, got %s: use preferred" .name $.Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- end -}}

{{- define "ngd.checkRoute" -}}
{{- $v := .Values -}}
{{- if and $v.ingress.enabled (not $v.ingress.host) -}}
{{- fail "ingress.enabled needs ingress.host, the name that people will type" -}}
{{- end -}}
{{- if and $v.httpRoute.enabled (not $v.httpRoute.parentRefs) -}}
{{- fail "httpRoute.enabled needs httpRoute.parentRefs, the gateways that it hangs on" -}}
{{- end -}}
{{- if le (int $v.controller.terminationGracePeriodSeconds) (int $v.controller.preStopSleepSeconds) -}}
{{- fail (printf "controller.terminationGracePeriodSeconds (%d) must exceed controller.preStopSleepSeconds (%d): the controller ends its streams after that sleep" (int $v.controller.terminationGracePeriodSeconds) (int $v.controller.preStopSleepSeconds)) -}}
{{- end -}}
{{- if and (include "ngd.severalControllers" .) (not $v.dashboard.separate) (not $v.dashboard.assumeSticky) -}}
{{- if and $v.ingress.enabled (ne $v.ingress.controller "nginx") -}}
{{- fail "a page of the dashboard lives in one controller, and ingress.controller=other gives several no stickiness: set dashboard.separate=true, or annotations that make it sticky and dashboard.assumeSticky=true" -}}
{{- end -}}
{{- if and $v.httpRoute.enabled (not $v.httpRoute.sessionPersistence) -}}
{{- fail "a page of the dashboard lives in one controller, and the HTTPRoute spreads requests over several: set dashboard.separate=true, or httpRoute.sessionPersistence, or dashboard.assumeSticky=true" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Kinds that the cluster must know. Every cluster serves apiregistration.k8s.io; a render without one does not list
     it, and is let through. */}}
{{- define "ngd.checkCluster" -}}
{{- $apis := .Capabilities.APIVersions -}}
{{- if $apis.Has "apiregistration.k8s.io/v1" -}}
{{- if and .Values.httpRoute.enabled (not ($apis.Has "gateway.networking.k8s.io/v1")) -}}
{{- fail "httpRoute.enabled makes an HTTPRoute, and this cluster does not know gateway.networking.k8s.io/v1: install the Gateway API's CRDs and a gateway (https://gateway-api.sigs.k8s.io), or set httpRoute.enabled=false" -}}
{{- end -}}
{{- if and .Values.rayCluster.enabled (not ($apis.Has "ray.io/v1")) -}}
{{- fail "rayCluster.enabled makes a RayCluster, and this cluster does not know ray.io/v1: install KubeRay 1.6 or newer, or set rayCluster.enabled=false and ray.address" -}}
{{- end -}}
{{- end -}}
{{- end -}}
