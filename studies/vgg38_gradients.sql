-- Queries of studies/vgg38_gradients.py. Three tables are not the store's: `plan` has one row per trial of the preset;
-- `chosen` one row per trial with a result; `student` the 97.5 % quantile t95 of Student's t for n readings. A query that
-- selects from another of this file gets it as a CTE.
--
-- Means over parameters count each number of a tensor once. A gradient that left the float32 numbers is +inf in the
-- store; a step with one is left out. Means over steps, layers and seeds are of logarithms; that of numbers of which one is 0
-- is 0.

-- name: networks
-- One row per trial with a result whose parameters all train: `leg` names it by what differs from the interim report's
-- network, `whole` whether it is trained to the end on CIFAR-100 for 100 epochs, and else as the paper preset has it. A leg
-- with several trials a seed, because another field was given several values, is left out: these are no repeats.
select
    trial,
    seed,
    case
        when norm = 'none' then 'no norm'
        when network = 'resnet' then 'ResNet'
        when weight_init = 'gaussian' then 'unscaled weights'
        when norm_init = 'ones' then 'gamma from 1'
        else 'VGG-38'
    end as leg,
    array_position(['VGG-38', 'gamma from 1', 'unscaled weights', 'ResNet', 'no norm'], leg) as place,
    step as last,
    outcome = 'finished' as finished,
    finished
    and (network, width, data, augmentation, epochs) = ('vgg_residual', 2, 'cifar100', 'flip_shift', 100)
    and (batch, norm_batch, lr, momentum, weight_decay) = (128, 128, 0.1, 0.9, 1e-4)
    and coalesce(norm_decay, weight_decay) = weight_decay
    and decay_on = 'all'
    and warmup = 0
    and len(milestones) = 0
    and plateau is null as whole
from chosen
join trials using (trial)
where
    depth = 38
    and network in ('vgg_residual', 'resnet')
    and norm in ('batch', 'none')
    and placement in ('every', 'none')
    and affine = 'both'
    and affine_at = placement
    and label_noise = 0
    and trainable = 'all'
    and gamma_l1 + gamma_l2 + beta_l1 + beta_l2 = 0
    and (
        norm = 'none'
        or (network, norm_init, weight_init) in (
            ('vgg_residual', 'uniform', 'he_normal'),
            ('vgg_residual', 'ones', 'he_normal'),
            ('vgg_residual', 'uniform', 'gaussian'),
            ('resnet', 'uniform', 'he_normal')
        )
    )
    and (norm != 'none' or (network, weight_init) = ('vgg_residual', 'he_normal'))
qualify count(*) over (partition by leg, seed) = 1
order by place, seed

-- name: tensors
-- One row per trial, step and parameter tensor, of the steps at which no gradient left the float32 numbers.
select parameter_gradient.*
from parameter_gradient
where trial in (select trial from networks)
qualify bool_and(isfinite(gradient) and isfinite(size)) over (partition by trial, step)

-- name: by_kind
-- One row per trial, step and kind, and for the kinds together that are 'batch norm' (gamma and beta), 'rest' (all
-- others), 'output' (its weights and biases, which are among the rest) and 'all': how many numbers it has, their mean
-- |gradient|, mean size, mean |last update| over its rate, and mean distance from the start; and the squared length of the
-- gradient. Sizes may be 0: beta starts there.
with
-- one row per tensor and each of its kind, its side and all
sorted as (
    select *, kind as what from tensors
    union all
    select *, if(kind in ('gamma', 'beta'), 'batch norm', 'rest') from tensors
    union all
    select *, 'output' from tensors where kind in ('output weight', 'output bias')
    union all
    select *, 'all' from tensors
)

select
    trial,
    step,
    what as kind,
    sum(sorted."count") as numbers,
    sum(sorted."count" * gradient) / numbers as gradient,
    sum(sorted."count" * size) / numbers as size,
    sum(sorted."count" * last_update) / numbers as last_update,
    sum(sorted."count" * moved) / sum(sorted."count") filter (where moved is not null) as moved,
    sum(sorted."count" * gradient_rms ^ 2) as square
from sorted
group by trial, step, what

-- name: kinds_over_training
-- One row per leg, kind and step: mean over parameters of |gradient|, of that over the mean size, of |last update| over its
-- learning rate, and of the distance from the start; geometric means over seeds, the first with its range. Null where a
-- size, an update or a distance is 0 or there is none.
select
    leg,
    kind,
    by_kind.step,
    exp(avg(ln(nullif(gradient, 0)))) as gradient,
    min(gradient) as minimum,
    max(gradient) as maximum,
    exp(avg(ln(nullif(gradient, 0) / nullif(size, 0)))) as relative,
    exp(avg(ln(nullif(last_update, 0)))) as last_update,
    exp(avg(ln(nullif(moved, 0)))) as moved,
    count(*) as n
from by_kind
join networks using (trial)
where kind not in ('batch norm', 'rest', 'output', 'all')
group by place, leg, kind, by_kind.step
order by place, kind, by_kind.step

-- name: gradient_over_training
-- One row per leg, kind and step: mean |gradient|, geometric mean over seeds with their range.
select leg, kind, step, gradient, minimum, maximum, n
from kinds_over_training

-- name: relative_over_training
-- One row per leg, kind and step: mean |gradient| over mean size, geometric mean over seeds; beta, which starts at 0, has
-- none before the first update.
select leg, kind, step, relative, n
from kinds_over_training

-- name: update_over_training
-- One row per leg, kind and step after which there is one: mean |last update| over its learning rate.
select leg, kind, step, last_update, n
from kinds_over_training
where last_update is not null

-- name: distance_over_training
-- One row per leg, kind and step after the first: mean distance of a parameter from where it started.
select leg, kind, step, moved, n
from kinds_over_training
where step > 0

-- name: share_over_training
-- One row per leg, kind and step: its share of the squared length of the whole gradient, mean over seeds; and of all
-- parameters.
select
    leg,
    part.kind,
    part.step,
    avg(part.square / whole.square) as share,
    avg(part.numbers / whole.numbers) as of_parameters,
    count(*) as n
from by_kind as part
join by_kind as whole on whole.trial = part.trial and whole.step = part.step and whole.kind = 'all'
join networks on networks.trial = part.trial
where part.kind not in ('batch norm', 'rest', 'output', 'all') and whole.square > 0
group by place, leg, part.kind, part.step
order by place, part.kind, part.step

-- --- gamma beside the convolution before it, layer by layer ----------------------------------------------------------------

-- name: by_layer
-- One row per trial, step and layer with a norm behind its convolution: their mean |gradient|s, and how many times gamma's
-- is the convolution's, measured and as sizes alone have it. Both sum over the images and pixels of the layer's output, m
-- of them. With g the gradient at a norm's output, of deviation s, and its m terms as good as independent, gamma's is a sum
-- of g y^ and about s sqrt(m); a weight's a sum of gamma g x / sigma, gamma (sd x) / sigma times as much. The norm's sigma
-- is that of a sum over the fan-in, (rms weight) sqrt(fan-in) (sd x). So gamma's is (rms weight) sqrt(fan-in) / (mean
-- |gamma|) times a weight's: m and x do not count, and at He's weights it is sqrt(2) / (mean |gamma|).
select
    gamma.trial,
    gamma.step,
    gamma.layer_index,
    gamma.gradient as gamma,
    beta.gradient as beta,
    weight.gradient as convolution,
    gamma.gradient / nullif(weight.gradient, 0) as measured,
    weight.size_rms * sqrt(weight."count" / gamma."count") / nullif(gamma.size, 0) as expected
from tensors as gamma
join tensors as beta using (trial, step, layer_index)
join tensors as weight using (trial, step, layer_index)
where
    gamma.kind = 'gamma'
    and beta.kind = 'beta'
    and weight.kind = 'convolution'
    and gamma.parameter not like '%shortcut%'
    and beta.parameter not like '%shortcut%'

-- name: layers
-- One row per leg, layer and kind: mean |gradient| over the readings of a training, geometric mean over these and seeds,
-- with the range over seeds.
with
-- one row per trial, layer and kind
by_trial as (
    select
        trial,
        layer_index,
        kind,
        exp(avg(ln(nullif(case kind when 'gamma' then gamma when 'beta' then beta else convolution end, 0)))) as gradient
    from by_layer
    cross join (values ('gamma'), ('beta'), ('convolution')) as kinds (kind)
    group by trial, layer_index, kind
)

select
    leg,
    layer_index,
    kind,
    exp(avg(ln(gradient))) as gradient,
    min(gradient) as minimum,
    max(gradient) as maximum,
    count(*) as n
from by_trial
join networks using (trial)
group by place, leg, layer_index, kind
order by place, layer_index, kind

-- name: gamma_over_convolution
-- One row per leg, step and reading (measured; expected from sizes): how many times gamma's mean |gradient| is that of the
-- convolution before it, geometric mean over layers and seeds.
select leg, by_layer.step, reading, exp(avg(ln(x))) as times, count(distinct trial) as n
from (
    select trial, step, 'measured' as reading, measured as x from by_layer
    union all
    select trial, step, 'expected', expected from by_layer
) as by_layer
join networks using (trial)
where x > 0
group by place, leg, by_layer.step, reading
order by place, by_layer.step, reading

-- --- claims -------------------------------------------------------------------------------------------------------------

-- name: sides
-- One row per trial and step of a network with norms. Ratios: batch norm over the rest, per parameter, of |gradient|, |last
-- update| and distance; batch norm over the output layer, of |gradient|; gamma over convolution, each over its mean size,
-- of |gradient| and distance. Beside them batch norm's mean |gradient| and its share of the squared length.
select
    bn.trial,
    bn.step,
    bn.gradient / nullif(rest.gradient, 0) as gradient,
    bn.gradient / nullif(output.gradient, 0) as output,
    bn.last_update / nullif(rest.last_update, 0) as last_update,
    bn.moved / nullif(rest.moved, 0) as moved,
    gamma.gradient / nullif(gamma.size, 0) / nullif(weight.gradient / nullif(weight.size, 0), 0) as relative,
    gamma.moved / nullif(gamma.size, 0) / nullif(weight.moved / nullif(weight.size, 0), 0) as moved_relative,
    bn.gradient as norms,
    bn.square / nullif(bn.square + rest.square, 0) as share
from by_kind as bn
join by_kind as rest using (trial, step)
join by_kind as output using (trial, step)
join by_kind as gamma using (trial, step)
join by_kind as weight using (trial, step)
where
    bn.kind = 'batch norm'
    and rest.kind = 'rest'
    and output.kind = 'output'
    and gamma.kind = 'gamma'
    and weight.kind = 'convolution'

-- name: readings
-- One row per trial with norms and reading, of trainings that finished. Over all readings of a training: 'gradient',
-- 'output', 'update' and 'relative' are geometric means of the ratios in `sides`, 'least' is the least ratio of gradients;
-- 'moved' and 'moved relative' are those at the end; 'stays' is batch norm's mean |gradient| in the last fifth of training
-- over that in the first; 'share' its mean share of the squared length; 'layers' the share of layers and readings in which
-- gamma's is above the convolution's. At the start: 'expected' is gamma over convolution, over what sizes have it to be,
-- geometric mean over layers, and 'beta' beta's over gamma's; 'expected in training' is the first of these after the start.
with
-- one row per trial
of_both as (
    select
        trial,
        min(gradient) as least,
        exp(avg(ln(gradient))) as gradient,
        exp(avg(ln(output))) as output,
        exp(avg(ln(last_update))) as last_update,
        exp(avg(ln(relative))) as relative,
        arg_max(moved, sides.step) as moved,
        arg_max(moved_relative, sides.step) as moved_relative,
        exp(
            avg(ln(norms)) filter (where sides.step >= 0.8 * last) - avg(ln(norms)) filter (where sides.step <= 0.2 * last)
        ) as stays,
        avg(share) as share
    from sides
    join networks using (trial)
    where finished and last > 0
    group by trial
),

-- one row per trial
of_depth as (
    select
        trial,
        avg((gamma > convolution)::int) as layers,
        exp(avg(ln(measured / expected)) filter (where by_layer.step = 0)) as expected,
        exp(avg(ln(measured / expected)) filter (where by_layer.step > 0)) as in_training,
        exp(avg(ln(beta / nullif(gamma, 0))) filter (where by_layer.step = 0)) as beta
    from by_layer
    join networks using (trial)
    where finished
    group by trial
)

select trial, reading, x
from of_both
join of_depth using (trial)
cross join lateral (
    values
    ('least', least),
    ('gradient', gradient),
    ('output', output),
    ('update', last_update),
    ('relative', relative),
    ('moved', moved),
    ('moved relative', moved_relative),
    ('stays', stays),
    ('share', share),
    ('layers', layers),
    ('expected', expected),
    ('expected in training', in_training),
    ('beta', beta)
) as each_reading (reading, x)
where x is not null

-- name: over_seeds
-- One row per leg, scope and reading: `readings` over seeds, with a 95 % interval where there are several. Shares ('share',
-- 'layers') have means, ratios geometric means, where a seed's 0 is no missing seed but makes the mean 0. Scope 'report' has
-- the trainings that are `whole`, 'any' whatever was trained.
with
-- one row per leg, scope and reading
over_trials as (
    select
        leg,
        place,
        scope,
        reading,
        reading in ('share', 'layers') as of_share,
        avg(if(of_share, x, ln(x))) as mean,
        count(x) as n,
        stddev_samp(if(of_share, x, ln(x))) / sqrt(n) as error
    from readings
    join networks using (trial)
    cross join (values ('report'), ('any')) as scopes (scope)
    where scope = 'any' or whole
    group by leg, place, scope, reading
)

select
    leg,
    scope,
    reading,
    if(of_share, mean, exp(mean)) as measured,
    n,
    if(n > 1, if(of_share, greatest(0, mean - t95 * error), exp(mean - t95 * error)), null) as low,
    if(n > 1, if(of_share, least(1, mean + t95 * error), exp(mean + t95 * error)), null) as high
from over_trials
left join student using (n)
order by scope, place, reading

-- name: between_legs
-- One row per comparison, at the start, over the seeds that have both legs: 'unscaled weights' is how many times larger
-- gamma's gradient over the convolution's is with weights of variance 1 than with He's, and 'unscaled weights, by size' the
-- same of their sizes; 'no norm' how many times larger the convolutions' gradients are without norms than with batch norm.
with
-- one row per trial: at the start, as logarithms
starts as (
    select
        trial,
        ln(any_value(weight.gradient)) as weight,
        ln(any_value(weight.size)) as size,
        avg(ln(by_layer.measured)) as excess
    from by_kind as weight
    left join by_layer using (trial, step)
    where weight.step = 0 and weight.kind = 'convolution'
    group by trial
),

-- one row per comparison and seed
pairs as (
    select
        other.leg || comparison as what,
        case
            when other.leg = 'no norm' then theirs.weight - ours.weight
            when comparison = '' then theirs.excess - ours.excess
            else theirs.size - ours.size
        end as x
    from networks as other
    join networks as vgg on vgg.seed = other.seed and vgg.leg = 'VGG-38'
    join starts as theirs on theirs.trial = other.trial
    join starts as ours on ours.trial = vgg.trial
    cross join (values (''), (', by size')) as comparisons (comparison)
    where other.leg = 'unscaled weights' or (other.leg = 'no norm' and comparison = '')
),

-- one row per comparison
over_trials as (
    select what, avg(x) as mean, count(x) as n, stddev_samp(x) / sqrt(count(x)) as error
    from pairs
    group by what
)

select what, exp(mean) as measured, n, exp(mean - t95 * error) as low, exp(mean + t95 * error) as high
from over_trials
left join student using (n)
order by what
