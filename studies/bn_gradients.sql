-- Queries of studies/bn_gradients.py. Three tables are not the store's: `plan` has one row per trial of the preset; `chosen`
-- one row per trial with a result; `student` the 97.5 % quantile t95 of Student's t for n readings. A query that selects from
-- another of this file gets it as a CTE. A loss that left the float32 numbers is +inf in the store, and no loss falls to it.

-- name: networks
-- One row per trial of plain gradient descent on all parameters, with batch norm after every layer or none: `title` is its
-- network in words. A network, initialisation, norm and rate with several trials a seed, because another field was given
-- several values, is left out: these are no repeats.
select
    trial,
    seed,
    network,
    if(network = 'resnet', 'ResNet-', 'VGG-') || depth as title,
    weight_init,
    norm,
    lr,
    if(data = 'cifar100', 100, 10) as classes,
    step as last,
    outcome
from chosen
join trials using (trial)
where
    network in ('resnet', 'vgg')
    and norm in ('batch', 'none')
    and placement in ('every', 'none')
    and affine = 'both'
    and affine_at = placement
    and label_noise = 0
    and trainable = 'all'
    and momentum = 0
    and weight_decay = 0
    and coalesce(norm_decay, 0) = 0
    and gamma_l1 + gamma_l2 + beta_l1 + beta_l2 = 0
    and warmup = 0
    and len(milestones) = 0
    and plateau is null
qualify count(*) over (partition by network, weight_init, norm, lr, seed) = 1
order by network, weight_init, norm, lr, seed

-- --- Section 1: the formulas -----------------------------------------------------------------------------------------

-- name: formulas
-- One row per formula and statistics (training: those of the images; constant: the same, held constant): the greatest error
-- over networks, layers, steps and numbers of images.
with
-- one row per reading, formula and statistics
readings as (
    select trial, 'g_gamma' as formula, 'training' as statistics, gamma_error as error from norm_gradient
    union all
    select trial, 'g_beta', 'training', beta_error from norm_gradient
    union all
    select trial, 'g_z and both terms', 'training', residual from norm_gradient
    union all
    select trial, 'g_gamma', 'constant', constant_gamma_error from norm_gradient
    union all
    select trial, 'g_beta', 'constant', constant_beta_error from norm_gradient
    union all
    select trial, 'g_z', 'constant', constant_input_error from norm_gradient
)

select
    formula,
    statistics,
    max(error) as measured,
    count(distinct seed) as n
from readings
join networks using (trial)
where error is not null
group by formula, statistics
order by statistics desc, formula

-- name: errors
-- One row per trial with batch norm, step, norm layer, number of images and place: the error of g_z at the norm's input, what
-- it makes of the gradient of the weights before the norm, and its error at the input where every later norm has it too.
with
-- one row per trial, step, norm layer, number of images and place
readings as (
    select trial, step, layer, layer_index, images, 'norm' as place, input_error as error from norm_gradient
    union all
    select trial, step, layer, layer_index, images, 'weights', weight_error from norm_gradient
    union all
    select trial, step, layer, layer_index, images, 'every norm', compound_error from norm_gradient
)

select
    trial,
    seed,
    network,
    title,
    weight_init,
    step,
    layer,
    layer_index,
    images,
    if(images = max(images) over (partition by trial), 'whole batch', images || ' images') as size,
    place,
    error
from readings
join networks using (trial)
where error is not null

-- name: errors_in_training
-- One row per network from He's weights, place and size: the median error over layers and steps, mean over seeds with its 95 %
-- interval; and of the last third of the layers with a norm over that of the first, geometric mean (`growth`).
with
-- one row per network, place, size and seed
by_seed as (
    select
        network,
        place,
        size,
        seed,
        median(error) as x,
        ln(median(error) filter (where 3 * layer_index > 2 * deepest) / median(error) filter (where 3 * layer_index <= deepest))
            as growth
    from (select *, max(layer_index) over (partition by trial) as deepest from errors where weight_init = 'he_normal') as placed
    group by network, place, size, seed
),

-- one row per network, place and size
over_seeds as (
    select
        network,
        place,
        size,
        avg(x) as mean,
        count(x) as n,
        stddev_samp(x) / sqrt(count(x)) as error,
        exp(avg(growth)) as growth
    from by_seed
    group by network, place, size
)

select network, place, size, mean as measured, n, mean - t95 * error as low, mean + t95 * error as high, growth
from over_seeds
left join student using (n)
order by network, place, size

-- name: growth_over_positions
-- One row per network and place: the error in the last third of the layers with a norm over that in the first, whole batch.
select network, place, growth as measured, n
from errors_in_training
where size = 'whole batch' and growth is not null

-- name: error_by_size
-- One row per network from He's weights, number of images and place: median error over layers, steps and seeds, with the
-- middle 80 %.
select
    title as panel,
    images,
    place,
    median(error) as error,
    quantile_cont(error, 0.1) as low,
    quantile_cont(error, 0.9) as high
from errors
where weight_init = 'he_normal'
group by title, images, place
order by title, place, images

-- name: error_by_position
-- One row per network from He's weights, place (at the norm, at the weights), layer and size: median error over steps and
-- seeds, a shortcut's norm counted to the layer beside it.
select
    title || if(place = 'norm', ', at the norm', ', at the weights') as panel,
    layer_index,
    size,
    median(error) as error
from errors
where weight_init = 'he_normal' and place in ('norm', 'weights') and size in ('2 images', '8 images', 'whole batch')
group by title, place, layer_index, size
order by title, place, size, layer_index

-- name: missing_terms
-- One row per network from He's weights, number of images and term: its share of the length of the note's g_z, median.
with
-- one row per reading and term
readings as (
    select trial, images, 'mean' as term, ones_part as part from norm_gradient
    union all
    select trial, images, 'variance', values_part from norm_gradient
)

select title as panel, images, term, median(part) as part
from readings
join networks using (trial)
where weight_init = 'he_normal'
group by title, images, term
order by title, term, images

-- name: radial_part
-- One row per network from He's weights, number of images and gradient: the radial part of the weights' gradient, median.
with
-- one row per reading and gradient
readings as (
    select trial, images, 'note' as gradient, weight_radial as radial from norm_gradient
    union all
    select trial, images, 'true', true_radial from norm_gradient
)

select title as panel, images, readings.gradient, median(radial) as radial
from readings
join networks using (trial)
where weight_init = 'he_normal'
group by title, images, readings.gradient
order by title, readings.gradient, images

-- --- Section 2: the series and the condition ---------------------------------------------------------------------------

-- name: endings
-- One row per trial: the bits that it has learned about an image's label, log2(classes) less the loss of its batches in training
-- mode, mean over the last fifth of the training; 0 where it diverged or is worse than chance. With one bit of them it `trains`.
with
-- one row per trial that came so far
late as (
    select trial, avg(loss_before) as loss
    from descent
    join networks using (trial)
    where descent.step >= 0.8 * last
    group by trial
)

select
    trial,
    seed,
    network,
    title,
    weight_init,
    norm,
    lr,
    if(outcome = 'diverged', 0, coalesce(greatest(0, (ln(classes) - loss) / ln(2)), 0)) as bits,
    bits >= 1 as trains
from networks
left join late using (trial)

-- name: lengths
-- One row per trial from He's weights, step and step size: whether the quadratic term is the smaller (`holds`), whether the
-- loss of the batch falls (`falls`), whether it is the length of the trial's own updates (`own`), and whether what the series
-- says is more than rounding (`seen`); and how far from the loss the series ends (`beyond`).
select
    trial,
    seed,
    network,
    title,
    norm,
    lr,
    descent.step,
    length,
    largest,
    first_order,
    second_order,
    second_order / first_order as ratio,
    abs(multiple - 1) < 1e-6 as own,
    second_order < first_order as holds,
    loss < loss_before as falls,
    loss_before,
    abs(loss - predicted) as beyond,
    abs(first_order - second_order) > 1e-5 * loss_before as seen
from descent
join networks using (trial)
where weight_init = 'he_normal' and first_order > 0

-- name: condition_holds
-- One row per network and norm: the share of steps, at the trials' own rates, whose quadratic term is the smaller; every trial
-- counts the same, mean over seeds with its 95 % interval.
with
-- one row per trial
by_trial as (
    select network, norm, seed, trial, avg(holds::int) as x
    from lengths
    where own
    group by network, norm, seed, trial
),

-- one row per network, norm and seed
by_seed as (
    select network, norm, seed, avg(x) as x
    from by_trial
    group by network, norm, seed
),

-- one row per network and norm
over_seeds as (
    select network, norm, avg(x) as mean, count(x) as n, stddev_samp(x) / sqrt(count(x)) as error
    from by_seed
    group by network, norm
)

select
    network,
    norm,
    mean as measured,
    n,
    greatest(0, mean - t95 * error) as low,
    least(1, mean + t95 * error) as high
from over_seeds
left join student using (n)
order by network, norm

-- name: falls_at_worst
-- One row per network and norm: the share of steps at the trials' own rate that lower the loss of their batch, at the rate with
-- the fewest; mean over seeds with its 95 % interval. What rounding hides does not count.
with
-- one row per network, norm, rate and seed
by_rate as (
    select network, norm, lr, seed, avg(falls::int) as x
    from lengths
    where own and seen
    group by network, norm, lr, seed
),

-- one row per network, norm and seed
by_seed as (
    select network, norm, seed, min(x) as x
    from by_rate
    group by network, norm, seed
),

-- one row per network and norm
over_seeds as (
    select network, norm, avg(x) as mean, count(x) as n, stddev_samp(x) / sqrt(count(x)) as error
    from by_seed
    group by network, norm
)

select
    network,
    norm,
    mean as measured,
    n,
    greatest(0, mean - t95 * error) as low,
    least(1, mean + t95 * error) as high
from over_seeds
left join student using (n)
order by network, norm

-- name: what_the_condition_says
-- One row per norm and condition (holds, fails): the share of step sizes at which the loss does what the note says, falls or
-- does not; over steps, step sizes and all trainings that train, mean over seeds with its 95 % interval. A network that does
-- not has hardly a gradient but its output's.
with
-- one row per norm, condition and seed
by_seed as (
    select
        norm,
        if(holds, 'holds', 'fails') as condition,
        seed,
        avg((falls = holds)::int) as x
    from lengths
    where seen and trial in (select trial from endings where trains)
    group by norm, condition, seed
),

-- one row per norm and condition
over_seeds as (
    select norm, condition, avg(x) as mean, count(x) as n, stddev_samp(x) / sqrt(count(x)) as error
    from by_seed
    group by norm, condition
)

select
    norm,
    condition,
    mean as measured,
    n,
    greatest(0, mean - t95 * error) as low,
    least(1, mean + t95 * error) as high
from over_seeds
left join student using (n)
order by norm, condition desc

-- name: no_direction_of_descent
-- One row: of the steps whose quadratic term is the greater at the trial's own rate, the share at which no step of less than a
-- tenth of the length where both are equal lowers the loss; mean over seeds with its 95 % interval.
with
-- one row per trial and step where one so short was looked at, and its change is more than rounding
by_step as (
    select seed, trial, step, not bool_or(falls) filter (where length < largest / 10) as none_falls
    from lengths
    group by seed, trial, step
    having bool_or(own and not holds) and count(*) filter (where length < largest / 10 and seen) > 0
),

-- one row per seed
by_seed as (
    select seed, avg(none_falls::int) as x
    from by_step
    group by seed
),

-- one row
over_seeds as (
    select avg(x) as mean, count(x) as n, stddev_samp(x) / sqrt(count(x)) as error
    from by_seed
)

select mean as measured, n, greatest(0, mean - t95 * error) as low, least(1, mean + t95 * error) as high
from over_seeds
left join student using (n)

-- name: condition_over_training
-- One row per network, rate, norm and step: quadratic over first-order term at the trials' own rate, geometric mean over the
-- seeds that train and where it is above 0, with their range.
select
    title || ', rate ' || format('{:g}', lr) as panel,
    norm,
    step,
    exp(avg(ln(ratio))) as ratio,
    min(ratio) as low,
    max(ratio) as high
from lengths
where own and ratio > 0 and isfinite(ratio) and trial in (select trial from endings where trains)
group by title, lr, norm, step
order by title, lr, norm, step

-- name: longest_step
-- One row per network, norm, rate and step: the length at which both terms are equal, median over seeds, where it is finite; it
-- is not where d'Hd is no greater than 0.
select
    title || if(norm = 'batch', ', batch norm', ', no norm') as panel,
    lr,
    step,
    median(coalesce(largest, 'inf')) as longest
from lengths
where own
group by title, norm, lr, step
having isfinite(longest)
order by title, norm, lr, step

-- name: falls_by_ratio
-- One row per network, norm and half decade of quadratic over first-order term: the share of steps that lower the loss, of ten
-- at least, of trainings that train.
select
    title as panel,
    norm,
    power(10, round(2 * log10(ratio)) / 2) as ratio,
    avg(falls::int) as falls,
    count(*) as n
from lengths
where
    seen
    and lengths.ratio between 1e-4 and 1e6
    and trial in (select trial from endings where trains)
group by title, norm, round(2 * log10(lengths.ratio))
having count(*) >= 10
order by title, norm, round(2 * log10(lengths.ratio))

-- name: beyond_the_series
-- One row per norm: how far the loss is from the series, over the second-order term, median over steps and step sizes of
-- trainings that train, mean over seeds with its 95 % interval. Counted are step sizes at which that term is at most a tenth of
-- the first-order one, and more than rounding.
with
-- one row per norm and seed
by_seed as (
    select norm, seed, median(beyond / abs(second_order)) as x
    from lengths
    where
        abs(second_order) between 1e-4 * loss_before and 0.1 * first_order
        and trial in (select trial from endings where trains)
    group by norm, seed
),

-- one row per norm
over_seeds as (
    select norm, avg(x) as mean, count(x) as n, stddev_samp(x) / sqrt(count(x)) as error
    from by_seed
    group by norm
)

select norm, mean as measured, n, greatest(0, mean - t95 * error) as low, mean + t95 * error as high
from over_seeds
left join student using (n)
order by norm

-- name: beyond_by_length
-- One row per network, time (before the first update; later), norm and half decade of step sizes: how far the loss is from the
-- series, over the first-order term; later, of trainings that train. Median of ten readings at least that rounding does not
-- hide.
select
    title || if(step = 0, ', at the start', ', later') as panel,
    norm,
    power(10, round(2 * log10(length)) / 2) as length,
    median(beyond / first_order) as beyond,
    count(*) as n
from lengths
where first_order > 1e-5 * loss_before and (step = 0 or trial in (select trial from endings where trains))
group by panel, norm, round(2 * log10(lengths.length))
having count(*) >= 10 and isfinite(median(lengths.beyond / first_order))
order by panel, norm, round(2 * log10(lengths.length))

-- --- Section 2: what batch norm lets a rate be -------------------------------------------------------------------------

-- name: rates_that_train
-- One row per network and norm: from the smallest rate that trains on, the share that does; mean over seeds with its 95 %
-- interval. Below it a rate is too small for so few steps, of which the note does not speak. 0 where none trains.
with
-- one row per trial from He's weights
slowest as (
    select *, min(lr) filter (where trains) over (partition by network, norm, seed) as least
    from endings
    where weight_init = 'he_normal'
),

-- one row per network, norm and seed
by_seed as (
    select network, norm, seed, coalesce(avg(trains::int) filter (where lr >= least), 0) as x
    from slowest
    group by network, norm, seed
),

-- one row per network and norm
over_seeds as (
    select network, norm, avg(x) as mean, count(x) as n, stddev_samp(x) / sqrt(count(x)) as error
    from by_seed
    group by network, norm
)

select
    network,
    norm,
    mean as measured,
    n,
    greatest(0, mean - t95 * error) as low,
    least(1, mean + t95 * error) as high
from over_seeds
left join student using (n)
order by network, norm

-- name: seeds_that_train
-- One row per network and norm: the share of seeds that train at one of the rates.
select network, norm, avg(trains::int) as measured, count(*) as n
from (
    select network, norm, seed, bool_or(trains) as trains
    from endings
    where weight_init = 'he_normal'
    group by network, norm, seed
) as by_seed
group by network, norm
order by network, norm

-- name: bits_over_rates
-- One row per network from He's weights, norm and rate: bits learned, mean over seeds with their range.
select
    title as panel,
    norm,
    lr,
    avg(bits) as bits,
    min(bits) as low,
    max(bits) as high
from endings
where weight_init = 'he_normal'
group by title, norm, lr
order by title, norm, lr

-- name: larger_rate
-- One row per network: the largest rate that trains with batch norm over that without, geometric mean over seeds with its 95 %
-- interval. Where none trains without, it is taken to be a decade below the smallest, and the number is the least that it can be
-- (`at_least`); where none trains with batch norm it is 0. Seeds at which neither trains are left out.
with
-- one row per network and seed
largest as (
    select
        network,
        seed,
        if(bool_or(norm = 'batch'), coalesce(max(lr) filter (where norm = 'batch' and trains), 0), null) as batch,
        max(lr) filter (where norm = 'none' and trains) as none,
        min(lr) filter (where norm = 'none') / 10 as below
    from endings
    where weight_init = 'he_normal'
    group by network, seed
),

-- one row per network
over_seeds as (
    select
        network,
        avg(ln(batch / coalesce(none, below))) as mean,
        count(batch / coalesce(none, below)) as n,
        stddev_samp(ln(batch / coalesce(none, below))) / sqrt(n) as error,
        bool_or(none is null) as at_least
    from largest
    where batch > 0 or none > 0
    group by network
)

select network, exp(mean) as measured, n, exp(mean - t95 * error) as low, exp(mean + t95 * error) as high, at_least
from over_seeds
left join student using (n)
order by network

-- name: longer_steps
-- One row per network: before the first update, the share of seeds at which both terms are equal at a greater length with batch
-- norm than without; and these lengths, medians. Where d'Hd is no greater than 0 they never are, and the length is infinite.
with
-- one row per network and seed; trials of other rates start alike
by_seed as (
    select
        network,
        seed,
        any_value(coalesce(largest, 'inf')) filter (where norm = 'batch') as batch,
        any_value(coalesce(largest, 'inf')) filter (where norm = 'none') as none
    from lengths
    where step = 0
    group by network, seed
)

select
    network,
    avg((batch > none)::int) as measured,
    count(batch > none) as n,
    median(batch) as batch_norm,
    median(none) as no_norm
from by_seed
group by network
order by network

-- --- Section 2: how the terms scale ------------------------------------------------------------------------------------

-- name: scaled
-- One row per trial from He's weights, set of parameters, factor of the weights before norms and reading: the reading's logarithm, from the
-- magnitude where d'Hd is negative.
with
-- one row per trial, set of parameters and factor
terms as (
    select trial, parameters, factor, sigma, ln(gradient_square) as first_order, ln(abs(quadratic)) as second_order
    from weight_scaling
    where gradient_square > 0 and quadratic != 0
),

-- one row per trial, set of parameters, factor and reading
readings as (
    select trial, parameters, factor, sigma, 'gradient' as reading, first_order / 2 as x from terms
    union all
    select trial, parameters, factor, sigma, 'hessian', second_order - first_order from terms
    union all
    select trial, parameters, factor, sigma, 'first order', first_order from terms
    union all
    select trial, parameters, factor, sigma, 'second order', second_order from terms
)

select seed, network, title, readings.*
from readings
join networks using (trial)
where weight_init = 'he_normal'

-- name: exponents
-- One row per network, set of parameters and reading: its exponent in sigma between factors 1 and 100, mean over seeds with its
-- 95 % interval.
with
-- one row per network, set of parameters, reading and seed
by_seed as (
    select network, parameters, reading, seed, regr_slope(x, ln(sigma)) as x
    from scaled
    where factor >= 1
    group by network, parameters, reading, seed
),

-- one row per network, set of parameters and reading
over_seeds as (
    select network, parameters, reading, avg(x) as mean, count(x) as n, stddev_samp(x) / sqrt(count(x)) as error
    from by_seed
    group by network, parameters, reading
)

select network, parameters, reading, mean as measured, n, mean - t95 * error as low, mean + t95 * error as high
from over_seeds
left join student using (n)
order by network, parameters desc, reading

-- name: exponent_below_epsilon
-- One row per network: the exponent of the first-order term of the weights before norms in their factor, from 0.001 to 0.01;
-- mean over seeds with its 95 % interval.
with
-- one row per network and seed
by_seed as (
    select network, seed, regr_slope(x, ln(factor)) as x
    from scaled
    where parameters = 'weights' and reading = 'first order' and factor between 0.0009 and 0.011
    group by network, seed
),

-- one row per network
over_seeds as (
    select network, avg(x) as mean, count(x) as n, stddev_samp(x) / sqrt(count(x)) as error
    from by_seed
    group by network
)

select network, mean as measured, n, mean - t95 * error as low, mean + t95 * error as high
from over_seeds
left join student using (n)
order by network

-- name: terms_over_sigma
-- One row per network from He's weights, set of parameters, factor and term: the term over its value at factor 1, geometric
-- mean over seeds, with the geometric mean of sigma.
with
-- one row per trial, set of parameters, factor and term
relative as (
    select
        title,
        parameters,
        factor,
        sigma,
        reading,
        x - any_value(x) filter (where factor = 1) over (partition by trial, parameters, reading) as x
    from scaled
    where reading in ('first order', 'second order')
)

select
    title || if(parameters = 'weights', ', weights before norms', ', all that trains') as panel,
    reading as term,
    exp(avg(ln(sigma))) as sigma,
    exp(avg(x)) as relative
from relative
group by title, parameters, factor, reading
order by title, parameters desc, reading, factor

-- --- Section 2: gamma --------------------------------------------------------------------------------------------------

-- name: gamma_exponents
-- One row per set of gammas of the VGG from He's weights: the exponent of the stem's gradient in them before the first update,
-- between a tenth of them and all, over the number of norms from the stem to the output; mean over seeds with its 95 % interval.
-- A ResNet has none: its skips carry the gradient past the norms of its branches.
with
-- one row per set and seed
by_seed as (
    select gammas, seed, regr_slope(ln(gradient), ln(factor)) / any_value(norms_behind) as x
    from gamma_scaling
    join networks using (trial)
    where
        network = 'vgg'
        and weight_init = 'he_normal'
        and gamma_scaling.step = 0
        and gammas in ('every', 'inner')
        and layer_index = 1
        and factor between 0.09 and 1
        and gradient > 0
    group by gammas, seed
),

-- one row per set
over_seeds as (
    select gammas, avg(x) as mean, count(x) as n, stddev_samp(x) / sqrt(count(x)) as error
    from by_seed
    group by gammas
)

select gammas, mean as measured, n, mean - t95 * error as low, mean + t95 * error as high
from over_seeds
left join student using (n)
order by gammas

-- name: gradients_by_gamma
-- One row per network from He's weights, set of gammas, factor and layer: length of the gradient, geometric mean over seeds.
select
    title || case gammas
        when 'every' then ', every gamma'
        when 'inner' then ', all but the last'
        else ', in branches'
    end as panel,
    layer_index,
    factor,
    exp(avg(ln(gradient))) as gradient
from gamma_scaling
join networks using (trial)
where
    weight_init = 'he_normal'
    and gamma_scaling.step = 0
    and gammas != 'ones'
    and gradient > 0
    and factor in (0.01, 0.1, 1, 10)
group by title, gammas, factor, layer_index
order by title, gammas != 'every', gammas != 'inner', factor, layer_index

-- name: gradients
-- One row per trial, layer and kind: length of the gradient of the weights before the first update, without norms, with batch
-- norm, and with a tenth of all its gammas but the last.
with
-- one row per trial, layer and kind
readings as (
    select trial, layer_index, 'none' as kind, rms * sqrt(weights) as gradient from gradient
    union all
    select trial, layer_index, 'batch', gradient from gamma_scaling where step = 0 and gammas = 'every' and factor = 1
    union all
    select trial, layer_index, 'small', gradient
    from gamma_scaling
    where step = 0 and gammas = 'inner' and abs(factor - 0.1) < 1e-6
)

select seed, network, title, weight_init, readings.*
from readings
join networks using (trial)
where readings.gradient > 0

-- name: vanishing_gradients
-- One row per network, initialisation, kind and layer: length of the gradient, geometric mean over seeds.
select
    title || if(weight_init = 'he_normal', ', He', ', Glorot') as panel,
    kind,
    layer_index,
    exp(avg(ln(gradients.gradient))) as gradient
from gradients
group by title, weight_init, kind, layer_index
order by title, weight_init, kind, layer_index

-- name: times_the_gradient
-- One row per initialisation of the VGG: the stem's gradient with batch norm over that without, geometric mean over seeds with
-- its 95 % interval.
with
-- one row per initialisation and seed
by_seed as (
    select
        weight_init,
        seed,
        ln(max(gradient) filter (where kind = 'batch')) - ln(max(gradient) filter (where kind = 'none')) as x
    from gradients
    where network = 'vgg' and layer_index = 1
    group by weight_init, seed
),

-- one row per initialisation
over_seeds as (
    select weight_init, avg(x) as mean, count(x) as n, stddev_samp(x) / sqrt(count(x)) as error
    from by_seed
    group by weight_init
)

select weight_init, exp(mean) as measured, n, exp(mean - t95 * error) as low, exp(mean + t95 * error) as high
from over_seeds
left join student using (n)
order by weight_init

-- name: gain_of_gammas
-- One row per network and initialisation: the stem's gradient at the end of training over what it is there with every gamma
-- put back to 1, of trainings that train; geometric mean over seeds with its 95 % interval.
with
-- one row per trial: logarithms
by_trial as (
    select
        network,
        weight_init,
        seed,
        ln(any_value(gradient) filter (where gammas = 'every' and factor = 1)) as trained,
        ln(any_value(gradient) filter (where gammas = 'ones')) as ones
    from gamma_scaling
    join networks using (trial)
    where
        layer_index = 1
        and gamma_scaling.step = last
        and last > 0
        and trial in (select trial from endings where trains)
    group by network, weight_init, seed, trial
),

-- one row per network and initialisation
over_seeds as (
    select
        network,
        weight_init,
        avg(trained - ones) as mean,
        count(trained - ones) as n,
        stddev_samp(trained - ones) / sqrt(count(trained - ones)) as error
    from by_trial
    group by network, weight_init
)

select
    network,
    weight_init,
    exp(mean) as measured,
    n,
    exp(mean - t95 * error) as low,
    exp(mean + t95 * error) as high
from over_seeds
left join student using (n)
order by network, weight_init
